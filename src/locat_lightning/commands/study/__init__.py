"""A study: arms trained alike with several seeds, probed and reported, all by the commands of `locat`."""
