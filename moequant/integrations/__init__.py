"""moequant inside other libraries. Each module needs the library that it is named for, and nothing else here imports them."""
