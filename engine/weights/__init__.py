"""Whole weight versions from the learner to the generators: published once, staged while sampling goes on.

    state    by whom      what is done                                        who dies in it leaves
    join     generator    compares the publisher's manifest with its own      nothing
    prepare  rank 0       makes the older slot unreadable                     the newer version, for all to read
    write    every rank   casts and sums its rows into the slot               the same
    commit   rank 0       header and digest, then the even sequence; tells    the same, until the sequence is even;
                          the coordinator, which records it and tells all     then the new version, whole
    stage    generator    copies the slot, or applies the delta, in memory    its leases, to others; the others read on
                          that it does not sample with, while it samples
    verify   generator    compares the digest; else it stages again           the same
    apply    generator    between two tokens samples with the other memory    the same; nobody sees half of it
    applied  generator    says so; from then on it gets leases of it

The commit comes before the staging, and no generator waits for another: what is committed does not change until the
slot is written again, and whoever was overtaken then notices by sequence and digest and stages the newer one. So each
generator is on one whole version, tokens say on which, and the tickets bound how old it may be. A generator that joins
late stages the newest in full. One that does not apply a version within `deadlines.publish_s` is left out (engine.
roster) until it does. One whose `load` fails, and may hold a mixture, ends; the next one starts from the whole.
Versions grow within an incarnation, incarnations fence each other, and a lock on the segment keeps to one writer.

    route        a generator stages from                                for
    shm          the segment itself                                     the learner's host
    tcp          a server in front of it, by deltas where they are few  any host; with keys and encryption
    collective   a broadcast to all at once, by NCCL or gloo            trusted networks; falls back to tcp
    disk         files in a directory                                   hosts that share only that
    cuda_ipc     the learners' memory, from GPU to GPU                  the learner's host, all of it on GPUs
"""

from engine.weights.device import Slots
from engine.weights.intake import Intake
from engine.weights.manifest import Manifest, WeightsError
from engine.weights.publish import Publisher
from engine.weights.segment import host_id, remove_stale
from engine.weights.subscribe import Staged, Subscriber, subscribe
from engine.weights.tcp import Server

__all__ = [
    "Intake",
    "Manifest",
    "Publisher",
    "Server",
    "Slots",
    "Staged",
    "Subscriber",
    "WeightsError",
    "host_id",
    "remove_stale",
    "subscribe",
]
