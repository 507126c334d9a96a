"""One user table: its file, headers, units, cells, filters, rows and runs."""
