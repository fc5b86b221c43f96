"""Reading zip, tar and folders without unpacking."""
