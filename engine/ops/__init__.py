"""The compiled operations; `reference` holds the same in plain Python."""

try:
    from engine.ops._host import gather, plan
except ImportError as error:
    raise ImportError(f"engine.ops._host cannot be loaded ({error}); `make install` builds it") from error

__all__ = ["gather", "plan"]
