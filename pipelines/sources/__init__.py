"""Raw data sets read as labelled images."""
