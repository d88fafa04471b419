"""No More Sliding Window for nnU-Net v2. Imported at interpreter start-up, so nothing heavy may be imported here."""

__version__ = "0.2.0"
