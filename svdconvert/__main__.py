"""python -m svdconvert"""

from svdconvert.cli import main

if __name__ == "__main__":
    main()
