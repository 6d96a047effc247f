"""How far the tests go that go on for as long as one lets them: `make thorough` sets LEEWAY_THOROUGH."""

import os

THOROUGH = os.environ.get("LEEWAY_THOROUGH") == "1"
