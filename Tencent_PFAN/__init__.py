"""The whole-image variant of PFAN, for Tencent-News: one caption an image, and the image's own feature beside its
regions'. Only what differs from the files in the folder above, which it builds on."""
