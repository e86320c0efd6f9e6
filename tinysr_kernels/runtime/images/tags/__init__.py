"""Parts of image files beside the pixels: EXIF, XMP, IPTC, and what headers state."""
