"""Lowerings of the dialect: each provider is a module with the functions of `tqc.ops`, made fast for one platform.

A provider has

    NAME                                        shown by `tqc.explain`
    supported() -> str | None                   why this machine cannot run it, or None
    accepts(k_fmt, v_fmt, dtype, device_type) -> str | None     why it cannot take these arguments, or None
    append, read, attend                        as in `tqc.ops`, same arguments, same results
"""
