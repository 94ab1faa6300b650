# Gets Debian's current cloud kernel: $OUT/vmlinuz, and its modules with their dependencies in
# ./tree. apt verifies what it downloads by Debian's signatures.

meta=linux-image-cloud-amd64
package=$(apt-cache depends --important "$meta" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)$/\1/p')
if [ -z "$package" ]; then
    echo "apt knows no $meta: run apt-get update, on Debian"
    exit 1
fi
apt-get download "$package"
dpkg-deb --extract "$package"_*.deb tree
cp tree/boot/vmlinuz-* "$OUT/vmlinuz"
depmod --basedir tree "${package#linux-image-}"
