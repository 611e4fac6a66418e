"""Files, hub data sets and packaged text -> tokenized examples."""
