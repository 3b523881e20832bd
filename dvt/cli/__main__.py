from dvt.__main__ import main

main()
