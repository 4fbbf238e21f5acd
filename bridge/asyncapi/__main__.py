"""`python -m bridge.asyncapi [--page]`: print docs/asyncapi.yaml, or docs/events.md."""

import sys

from bridge.asyncapi.document import as_yaml, document
from bridge.asyncapi.page import page

sys.stdout.write(page(document()) if "--page" in sys.argv[1:] else as_yaml())
