"""Pure decisions of diskd: no I/O, no clock, no trio."""
