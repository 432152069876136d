"""`python -m moequant` prints what this machine gets."""

from moequant.environment import environment

if __name__ == "__main__":
    print(environment())
