"""`locat study`: arms trained with several seeds, probed and compared, by the other commands of `locat`."""
