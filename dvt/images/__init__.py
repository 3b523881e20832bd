"""Find images on disk or at URLs, read their sizes from the header, and read them as RGB in [0, 1].

Every fault of a file raises an :class:`~dvt.errors.ImageError` that names the file and the reason; nothing is replaced,
padded or skipped silently.
"""

from dvt.images.find import SUFFIXES, find_images, find_sources
from dvt.images.read import (
    MAX_PIXELS,
    ImageLike,
    file_sha256,
    image_size,
    load_image,
    load_pixels,
    load_stored,
    read_image,
    size_and_sha256,
)
from dvt.images.several import image_list, none_usable, readable, several_images, usable_images
from dvt.images.urls import MAX_BYTES, is_url, url_files

__all__ = [
    "MAX_BYTES",
    "MAX_PIXELS",
    "SUFFIXES",
    "ImageLike",
    "file_sha256",
    "find_images",
    "find_sources",
    "image_list",
    "image_size",
    "is_url",
    "load_image",
    "load_pixels",
    "load_stored",
    "none_usable",
    "read_image",
    "readable",
    "several_images",
    "size_and_sha256",
    "url_files",
    "usable_images",
]
