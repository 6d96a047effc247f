"""In the place of SGLang's CUDA kernels, which have no wheel for machines without CUDA.

SGLang imports names of them on a CPU too, and calls none there."""

from stand_in import install

install(__name__)

__version__ = "0.0.0"
