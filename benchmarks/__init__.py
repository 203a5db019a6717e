"""What is measured on one machine, and can be measured on yours."""
