"""Whole weight versions from the learner to the generators: published once, staged while sampling goes on."""

from engine.weights.manifest import Manifest, WeightsError
from engine.weights.publish import Publisher
from engine.weights.segment import host_id, remove_stale
from engine.weights.subscribe import Staged, Subscriber, subscribe
from engine.weights.tcp import Server

__all__ = [
    "Manifest",
    "Publisher",
    "Server",
    "Staged",
    "Subscriber",
    "WeightsError",
    "host_id",
    "remove_stale",
    "subscribe",
]
