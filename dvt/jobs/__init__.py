"""Run jobs over many images, in one process or on a cluster; this is the part that all stages share."""
