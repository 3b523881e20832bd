"""The common part of jobs over many images, in one process or on a cluster; nothing here knows a stage."""
