"""The packed format and its maths: what the bytes mean, on every device and on disk.

`packed` is the layout of a page, `groups` and `blocks` say which tokens share the pages of a group, `codebook` the
levels of a code, `rotation` what comes before coding, and `quantizer` the reference of encoding and decoding.
"""

from tqc.format.groups import Groups
from tqc.format.packed import (
    ALIGNMENT,
    CENTRE_LIMIT,
    CENTRE_ZERO,
    FORMAT_VERSION,
    HEADER_BYTES,
    PAGE_TOKENS,
    SCALE_NAN,
    SCALE_STEPS,
    SCALE_ZERO,
    PackedFormat,
    pack_plane,
    scale_table,
    unpack_plane,
)

__all__ = [
    "ALIGNMENT",
    "CENTRE_LIMIT",
    "CENTRE_ZERO",
    "FORMAT_VERSION",
    "HEADER_BYTES",
    "Groups",
    "PAGE_TOKENS",
    "SCALE_NAN",
    "SCALE_STEPS",
    "SCALE_ZERO",
    "PackedFormat",
    "pack_plane",
    "scale_table",
    "unpack_plane",
]
