"""pytest plugin of Holdfast: the fixture `lab`."""
