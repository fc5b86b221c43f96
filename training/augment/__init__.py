"""Random views of images for contrastive pre-training and denoising."""
