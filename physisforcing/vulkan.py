"""``python -m physisforcing.vulkan``, for set-up. The code is ``physisforcing.core.vulkan``, because rooms import core only."""

import sys

from physisforcing.core.vulkan import ensure_vulkan_env, main

__all__ = ["ensure_vulkan_env", "main"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
