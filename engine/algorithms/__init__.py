"""Slots of a method: pure functions on flat arrays, each in one table, composed by `method.compose`.

`penalties` and `slots` import no torch, so that the coordinator can use them.
"""
