"""Files: checksums, links, mapped arrays, and files that only one process creates."""
