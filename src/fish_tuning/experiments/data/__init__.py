"""From files, hub data sets and packaged text to tokenized examples."""
