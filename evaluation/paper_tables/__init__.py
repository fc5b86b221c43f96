"""Tables of the paper: the settings with which each row is trained here, and recorded results beside the paper's."""
