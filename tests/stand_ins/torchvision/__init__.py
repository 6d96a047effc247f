"""In the place of torchvision, of which no CPU wheel fits: SGLang's text path looks up names in it and calls none."""

from stand_in import install

install(__name__)

__version__ = "0.0.0"
