"""Other implementations' weights as our parameter trees, one family per file. Pure: arrays in, arrays out."""
