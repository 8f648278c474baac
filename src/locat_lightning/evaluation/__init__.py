"""What a frozen backbone is worth, without a Trainer."""
