"""``python -m moe_a2a``: bench, plan and doctor. One idea per file; nothing else imports this."""
