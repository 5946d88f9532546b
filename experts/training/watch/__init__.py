"""What is looked at while a network trains, beside its loss: its speed, and whether it diverges."""
