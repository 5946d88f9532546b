"""Ray clusters on this machine that act as islands."""
