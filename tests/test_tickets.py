from engine.tickets import Tickets


def test_capacity_is_staleness_plus_one_steps() -> None:
    assert Tickets(max_staleness=4, groups_per_step=16).num_free == 80
    assert Tickets(max_staleness=0, groups_per_step=3).num_free == 3


def test_a_ticket_returns_when_what_it_made_is_settled() -> None:
    tickets = Tickets(max_staleness=1, groups_per_step=2)
    tickets.settle(0)
    for group_id in range(4):
        tickets.acquire(group_id)
    tickets.hold([0, 1], version=1)
    tickets.hold([2], version=2)
    assert tickets.num_free == 0
    tickets.settle(1)
    assert tickets.num_free == 2
    tickets.settle(2)
    assert tickets.num_free == 3


def test_a_newer_version_settles_the_older_ones() -> None:
    tickets = Tickets(max_staleness=1, groups_per_step=1)
    for group_id, version in ((0, 1), (1, 2)):
        tickets.acquire(group_id)
        tickets.hold([group_id], version)
    tickets.settle(2)
    assert tickets.num_free == 2


def test_what_is_settled_stays_so_when_an_older_generator_comes() -> None:
    tickets = Tickets(max_staleness=0, groups_per_step=1)
    tickets.settle(3)
    tickets.settle(1)
    tickets.acquire(7)
    tickets.hold([7], version=2)
    assert tickets.num_free == 1


def test_a_group_that_ends_untaken_gives_its_ticket_back_at_once() -> None:
    tickets = Tickets(max_staleness=0, groups_per_step=1)
    tickets.acquire(0)
    tickets.release(0)
    assert tickets.num_free == 1
