"""Packed caches: the tensor type that a user's cache holds, its memory, and its file."""
