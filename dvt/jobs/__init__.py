"""What jobs over many images share, in one process or on a cluster; nothing here knows a stage."""
