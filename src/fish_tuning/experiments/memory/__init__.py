"""The memory that training and scoring an arm take, estimated without weights."""
