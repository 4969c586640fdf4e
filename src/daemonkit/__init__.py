"""What both daemons stand on. A module enters only when both already need it."""
