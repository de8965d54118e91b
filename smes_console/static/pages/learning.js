export const title = "Learning";

export function mount(root, context) {
  return { update() {}, unmount() {} };
}
