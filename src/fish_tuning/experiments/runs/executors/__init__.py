"""Where the runs of a sweep are carried out: in this process, or as tasks of Ray."""
