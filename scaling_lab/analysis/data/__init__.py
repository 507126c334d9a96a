"""Tables, files and run records, and the `Observations` made from them, which all fits use."""
