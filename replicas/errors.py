"""The errors of a replica.

ReplicaError
├── BadRequest            the caller's fault; fails alone, never a step
│   └── DoesNotFit        longer than the context or the whole KV pool
├── BadCheckpoint         the model folder cannot be served; names file, field and fix
├── BadParallelism        degrees that do not divide the model; prints every factor
├── BadKernels            kernels asked for that this device or this torch has not got; says why
├── RankLost              a rank died or stalled; the whole group goes
└── MeterUnavailable      this host cannot measure; says what is missing
"""

from __future__ import annotations


class ReplicaError(Exception):
    """Base of every error this package raises on purpose."""


class BadRequest(ReplicaError, ValueError):
    """A request that can never be served as it is."""


class DoesNotFit(BadRequest):
    """A request longer than the context, or than all KV blocks of its lane."""


class BadCheckpoint(ReplicaError, ValueError):
    """A model folder that cannot be served."""


class BadParallelism(ReplicaError, ValueError):
    """Parallel degrees that do not divide the model."""


class BadKernels(ReplicaError, ValueError):
    """Kernels that were asked for by name and cannot be had."""


class RankLost(ReplicaError, RuntimeError):
    """A rank process died or stopped making progress."""


class MeterUnavailable(ReplicaError, RuntimeError):
    """The asked-for meter cannot be read here."""
