# Makes the small guest kernel: $OUT/vmlinux and $OUT/bzImage, of the source in $SOURCE, configured
# as nothing at all (tinyconfig) and then by the *.cfg in this folder.

mkdir source
tar --extract --file "$SOURCE" --strip-components 1 --directory source
cd source

make tinyconfig
scripts/kconfig/merge_config.sh -m .config ../*.cfg
make olddefconfig

# What a fragment asks for must be in the outcome: options get renamed.
for fragment in ../*.cfg; do
    while read -r line; do
        case $line in
            CONFIG_*) grep -qxF -- "$line" .config || lost="${lost-} $line" ;;
            '# CONFIG_'*' is not set')
                option=${line#'# '}
                option=${option%' is not set'}
                if grep -q "^$option=" .config; then lost="${lost-} $option=n"; fi ;;
        esac
    done < "$fragment"
done
if [ -n "${lost-}" ]; then
    echo "the configuration did not take:$lost"
    exit 1
fi

# The same input gives the same kernel.
export KBUILD_BUILD_TIMESTAMP='1970-01-01' KBUILD_BUILD_USER=cowshed KBUILD_BUILD_HOST=cowshed
make -j"$(nproc)" bzImage

cp arch/x86/boot/bzImage "$OUT/bzImage"
objcopy --strip-all vmlinux "$OUT/vmlinux"
