"""The commands of `wattline`, one file each. They import what is slow only when they run."""
