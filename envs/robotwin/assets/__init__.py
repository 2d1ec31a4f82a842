"""The self-made asset pack: a dual-arm robot and objects generated from the code in this folder."""

from .pack import PACK_VERSION, ensure_pack, pack_identity

__all__ = ["PACK_VERSION", "ensure_pack", "pack_identity"]
