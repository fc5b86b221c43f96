"""Reading zip files, tar files and folders without unpacking."""
