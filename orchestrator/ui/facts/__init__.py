"""What the pages show, read from run folders: plain values, no HTML."""
