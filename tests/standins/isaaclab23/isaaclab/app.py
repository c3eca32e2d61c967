"""AppLauncher, which starts Kit; Kit, closing, ends the process."""

import os
import sys

from . import write


class AppLauncher:
    """Keeps its arguments to itself, as Kit's app is all that is asked for."""

    def __init__(self, **options):
        words = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
        write(f"AppLauncher {words}, PyTorch imported: {'torch' in sys.modules}")
        self.app = self

    def close(self):
        write("app.close")
        os._exit(0)
