"""Sources of raw images: generated glyphs, Omniglot, Mini-ImageNet, folders of images."""
